"""`madtp-hf ask`: answer every question about an image."""

from . import bulk, options


def ask(
    model: options.Model,
    images: options.Images,
    out: options.OutFile,
    question: options.Question = None,
    suffix: options.Suffix = None,
    reduction: options.Reduction = None,
    max_new_tokens: options.MaxNewTokens = 10,
    num_beams: options.NumBeams = 1,
    do_sample: options.DoSample = False,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.AutoDtype = None,
    precision: options.Precision = options.Precisions.auto,
    memory: options.Memory = None,
    batch_size: options.AutoBatchSize = None,
    workers: options.Workers = None,
    ray: options.Ray = None,
    split: options.Split = None,
    columns: options.Columns = None,
    image_dir: options.ImageDir = None,
    max_pixels: options.MaxPixels = None,
    retry_errors: options.RetryErrors = False,
    force: options.Force = False,
) -> None:
    """Answer every question of a table, or one about every image. Run it again to resume.

    Example: madtp-hf ask org/blip-vqa-madtp questions.jsonl answers.parquet --reduction 0.5
    """
    bulk.run("Answerer", model, images, out, dict(locals()), question)
