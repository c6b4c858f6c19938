"""`python -m hf_eagle VERB` is `hf-eagle VERB`."""

from .cli import main


if __name__ == "__main__":
    main()
