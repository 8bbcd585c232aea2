"""Ask a saved checkpoint through its own pipeline, without this package: the import of `madtp_hf` is made to fail first.

python examples/ask_checkpoint.py CHECKPOINT '[["scene.png", "how many sevens are there?"]]'
"""

import json
import sys


sys.modules["madtp_hf"] = None

from transformers import pipeline  # noqa: E402


def main():
    checkpoint, asked = sys.argv[1], json.loads(sys.argv[2])
    answer = pipeline("visual-question-answering", model=checkpoint, trust_remote_code=True)
    for image, question in asked:
        print(f"{image}  {question}  {answer(image=image, question=question)}")


if __name__ == "__main__":
    main()
