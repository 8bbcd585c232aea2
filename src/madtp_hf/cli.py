"""The `madtp-hf` command as `python -m madtp_hf.cli`; it is in `madtp_hf_cli`, outside the package, to start fast."""

from madtp_hf_cli import app


__all__ = ["app"]

if __name__ == "__main__":
    app()
