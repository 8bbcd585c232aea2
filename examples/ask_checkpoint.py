"""Ask a saved checkpoint through its own pipeline, without this package: `madtp_hf` is made unimportable first.

    python examples/ask_checkpoint.py CHECKPOINT '[["scene.png", "how many sevens are there?"]]'

Loading runs the Python files in the checkpoint's folder: read them first, unless you saved them yourself.
"""

import argparse
import json
import os
import sys


def read_pairs(text: str) -> list[tuple[str, str]]:
    """Parse a JSON list of pairs of an image path and a question."""
    expected = """expected a JSON list of pairs, '[["scene.png", "how many sevens are there?"]]'"""
    try:
        pairs = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text[:200]!r} is not JSON ({error}): {expected}") from error
    is_list = isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
    if not is_list or not all(isinstance(part, str) for pair in pairs for part in pair):
        raise argparse.ArgumentTypeError(f"{text[:200]!r} has another form: {expected}")
    return [tuple(pair) for pair in pairs]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="The folder of a saved question answering checkpoint; not a Hub id.")
    parser.add_argument(
        "asked", type=read_pairs, help="Questions: a JSON list of pairs of an image path and a question."
    )
    args = parser.parse_args()
    if not os.path.isdir(args.checkpoint):  # a Hub id would run whatever code that repository holds at that time
        sys.exit(f"There is no folder {args.checkpoint}: expected one with a saved checkpoint.")

    sys.modules["madtp_hf"] = None
    from transformers import pipeline  # imported late so that --help is fast

    answer = pipeline("visual-question-answering", model=args.checkpoint, trust_remote_code=True)
    for image, question in args.asked:
        print(f"{image}  {question}  {answer(image=image, question=question)}")


if __name__ == "__main__":
    main()
