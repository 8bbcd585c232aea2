"""Compare LoRA with full fine-tuning under pruning, on the digit questions.

Both use the same data, number of steps and initial alignment tokens. The script writes the accuracy of both at the
trained reduction and with pruning off, the share of trained parameters, and the size of the saved files.

    python benchmarks/lora.py                                              # as in benchmarks/results/lora_digits.json
    python benchmarks/lora.py --split validation --train_questions 3200 --methods lora --rank 8 \\
        --output outputs/lora.json   # to choose settings
"""

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from digit_tasks import Evaluation, load_model, make_batches, make_collator, train
from peft import LoraConfig, get_peft_model
from reporting import EXAMPLES, environment, make_parser, settings_of, write_json
from transformers import set_seed

from madtp_hf import ReductionCallback, calibrate
from madtp_hf.data import load_digit_questions


def run(method: str, args, collator, train_data, calibration: list[dict], evaluation: Evaluation) -> dict:
    """Fine-tune with one method, calibrate, evaluate, save; return the results."""
    set_seed(args.seed)  # both methods start with the same new alignment tokens
    model = load_model("vqa", args.model, args.seed, num_alignment_tokens=256, alignment_dim=24)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    learning_rate = args.learning_rate
    if method == "lora":
        learning_rate = args.lora_learning_rate
        target = args.target_modules[0] if args.target_modules == ["all-linear"] else args.target_modules
        config = LoraConfig(r=args.rank, lora_alpha=args.alpha, target_modules=target, modules_to_save=["alignment"])
        model = get_peft_model(model, config)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    calibrate(model, calibration, [args.reduction])  # gives the callback its starting point
    started = time.process_time()
    callbacks, settings = [ReductionCallback(args.reduction)], {"per_device_train_batch_size": args.batch_size}
    steps = train(model, "vqa", train_data, collator, callbacks, args.seed, learning_rate, **settings)
    seconds = time.process_time() - started
    calibrate(model, calibration, [args.reduction])
    points = evaluation.at(model, [0.0, args.reduction])
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if method == "lora":
            model.config.save_pretrained(Path(folder) / "pruning")
        saved = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {
        "method": method,
        "learning rate": learning_rate,
        "steps": steps,
        "trained parameters": trained,
        "trained share": trained / parameters,
        "saved bytes": saved,
        "training CPU seconds": round(seconds, 1),
        "results": points,
    }


def main(arguments=None):
    parser = make_parser(__doc__, "lora_digits.json")
    parser.add_argument("--model", default=str(EXAMPLES / "blip-vqa-digits"), help="A dense BLIP: a folder or Hub id.")
    parser.add_argument("--methods", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="The split to evaluate on.")
    parser.add_argument("--train_questions", type=int, default=12800)
    parser.add_argument("--calibration_questions", type=int, default=512)
    parser.add_argument("--evaluation_questions", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--reduction", type=float, default=0.5)
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="Learning rate of full fine-tuning.")
    parser.add_argument("--lora_learning_rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--alpha", type=int, default=8)
    parser.add_argument(
        "--target_modules", nargs="+", default=["all-linear"], help="Modules that get LoRA: names, or all-linear."
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(arguments)
    collator = make_collator("vqa", args.model)
    train_data = load_digit_questions("train", args.train_questions, args.seed)
    # Not the evaluation data, even when settings are chosen on the validation split.
    calibration = load_digit_questions("validation", args.calibration_questions, args.seed)
    evaluated = load_digit_questions(args.split, args.evaluation_questions, args.seed + (args.split != "test"))
    evaluation = Evaluation("vqa", evaluated, collator)
    title = f"LoRA and full fine-tuning at {args.reduction} reduction, {len(evaluated)} {args.split} questions"
    content = {"title": title, "settings": settings_of(args, "model", "methods"), **environment(packages=("peft",))}
    runs = []
    for method in args.methods:
        runs.append(run(method, args, collator, train_data, make_batches("vqa", calibration, collator), evaluation))
        print(json.dumps(runs[-1]), flush=True)
        write_json(args.output, {**content, "runs": runs})


if __name__ == "__main__":
    main()
