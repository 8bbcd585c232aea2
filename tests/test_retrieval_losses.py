"""The losses that retrieval learns from: contrastive, and matching with hard negatives."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from madtp_hf.modeling.retrieval_loss import contrastive_loss, draw_hard_negatives

from .conftest import close, make_retrieval_inputs, make_task_model


def test_the_contrastive_loss_by_hand():
    image, text = F.normalize(torch.randn(2, 5, 8), dim=-1)
    ids = torch.tensor([7, 4, 7, 2, 7])  # three texts are of one image
    loss = 0.0
    for query, keys in ((image, text), (text, image)):
        for row in range(5):
            log_likelihood = (query[row] @ keys.T / 0.07).log_softmax(0)
            own = [column for column in range(5) if ids[column] == ids[row]]
            loss -= sum(log_likelihood[column] for column in own) / len(own) / 5 / 2
    close(contrastive_loss(image, text, ids, None), loss)
    apart = contrastive_loss(image, text, torch.arange(5), None)
    labels = torch.arange(5)
    expected = F.cross_entropy(image @ text.T / 0.07, labels) + F.cross_entropy(text @ image.T / 0.07, labels)
    close(apart, expected / 2)
    assert abs(loss - apart) > 0.1


def test_a_hard_negative_is_never_of_the_same_image():
    ids = torch.tensor([7, 4, 7, 2, 7, 4])
    feature = F.normalize(torch.randn(6, 8), dim=-1)
    others = feature + 0.01 * torch.randn(6, 8)  # each one's likeliest is itself
    drawn = torch.zeros(6, 6)
    for _ in range(200):
        which, negatives = draw_hard_negatives(feature, others, ids, ids, 0.5)
        assert which.tolist() == list(range(6))
        drawn[which, negatives] += 1
    assert (drawn[ids[:, None] == ids] == 0).all()
    # The likelier, the more similar.
    likelihood = (feature @ others.T / 0.5).exp().masked_fill(ids[:, None] == ids, 0)
    close(drawn / 200, likelihood / likelihood.sum(1, keepdim=True), atol=0.15)


@pytest.mark.parametrize("temperature", (0.0, 3.0))
@torch.no_grad()
def test_the_training_loss_is_its_parts(temperature):
    """Of two pairs, each one's hard negative can only be the other."""
    model = make_task_model("retrieval")
    model.set_pruning(temperature=temperature)
    inputs = make_retrieval_inputs((9, 5))
    output = model(**inputs, return_loss=True)
    plain, apart = model(**inputs), model(**inputs, use_itm_head=False)
    close(output.itm_score, plain.itm_score)
    close(output.image_feature, apart.image_feature)
    close(output.text_feature, apart.text_feature)
    close(output.alignment_loss, apart.alignment_loss)
    close(output.contrastive_loss, contrastive_loss(apart.image_feature, apart.text_feature, torch.arange(2), None))
    crossed = model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(0)}).itm_score
    scores = torch.cat([plain.itm_score, crossed, crossed])
    close(output.matching_loss, F.cross_entropy(scores, torch.tensor([1, 1, 0, 0, 0, 0])), atol=1e-4)
    close(output.task_loss, output.contrastive_loss + output.matching_loss)
    close(output.loss, output.task_loss + 0.1 * output.alignment_loss)


@torch.no_grad()
def test_texts_of_one_image_are_no_negatives_of_each_other():
    """Three of four texts are of one image: a negative of theirs can only be the fourth, one of the fourth any of
    them.
    """
    model, inputs = make_task_model("retrieval"), make_retrieval_inputs((9, 5, 7, 6))
    texts, images = (torch.arange(4).repeat_interleave(4), torch.arange(4).repeat(4))
    pairs = {name: inputs[name][images if name == "pixel_values" else texts] for name in inputs}
    log_likelihood = model(**pairs).itm_score.log_softmax(1).view(4, 4, 2)  # of each text with each image

    def loss(images_drawn, texts_drawn):
        """The matching loss with, for each text, an image that is not its own, and for each image a text."""
        matching = log_likelihood.diagonal()[1].sum()
        for row, (image, text) in enumerate(zip(images_drawn, texts_drawn)):
            matching = matching + log_likelihood[row, image, 0] + log_likelihood[text, row, 0]
        return -matching / 12

    ids = torch.tensor([5, 5, 5, 1])
    allowed = torch.stack([loss((3, 3, 3, i), (3, 3, 3, j)) for i, j in itertools.product(range(3), repeat=2)])
    # One negative of the same image is another loss: the check would see it.
    refused = torch.stack([loss((1, 3, 3, i), (3, 3, 3, j)) for i, j in itertools.product(range(3), repeat=2)])
    assert (refused[:, None] - allowed).abs().min() > 1e-4
    seen = set()
    for _ in range(10):
        distance = (model(**inputs, return_loss=True, image_ids=ids).matching_loss - allowed).abs()
        assert distance.min() < 1e-5
        seen.add(int(distance.argmin()))
    assert len(seen) > 1  # it is drawn
    # Texts of four images are negatives of each other.
    losses = [model(**inputs, return_loss=True, image_ids=torch.arange(4)).matching_loss for _ in range(10)]
    assert (torch.stack(losses)[:, None] - allowed).abs().amin(1).max() > 1e-4


@pytest.mark.parametrize("temperature", (0.0, 3.0))
def test_retrieval_learns_a_small_batch(temperature):
    model = make_task_model("retrieval", image_text_hidden_size=32).train()
    model.set_pruning(temperature=temperature)
    inputs = make_retrieval_inputs((9, 5, 7, 6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        output = model(**inputs, return_loss=True)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append([output.contrastive_loss.item(), output.matching_loss.item()])
    losses = torch.tensor(losses)
    assert losses.isfinite().all()
    assert (losses[-5:].mean(0) < 0.5 * losses[:5].mean(0)).all(), losses
    # And what it learned is there without the loss.
    model.eval()
    with torch.no_grad():
        similarity = model(**inputs, use_itm_head=False).itm_score
        assert (similarity.argmax(1) == torch.arange(4)).all() and (similarity.argmax(0) == torch.arange(4)).all()
