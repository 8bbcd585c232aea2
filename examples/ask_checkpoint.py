"""Ask a saved checkpoint through its own pipeline, without this package: the import of `madtp_hf` is made to fail first.

python examples/ask_checkpoint.py CHECKPOINT '[["scene.png", "how many sevens are there?"]]'
"""

import json
import os
import sys


sys.modules["madtp_hf"] = None

from transformers import pipeline  # noqa: E402


def main():
    checkpoint, asked = sys.argv[1], json.loads(sys.argv[2])
    if not os.path.isdir(checkpoint):  # a Hub id would run whatever code that repository holds by then
        sys.exit(f"There is no folder {checkpoint}: expected one with a saved checkpoint.")
    answer = pipeline("visual-question-answering", model=checkpoint, trust_remote_code=True)
    for image, question in asked:
        print(f"{image}  {question}  {answer(image=image, question=question)}")


if __name__ == "__main__":
    main()
