"""The `madtp-hf` command as `python -m madtp_hf.cli`. It is in `madtp_hf_cli`, outside the package, whose import takes seconds."""

from madtp_hf_cli import app


__all__ = ["app"]

if __name__ == "__main__":
    app()
