"""What a stock vLLM finds by `PYTHONPATH`: the folder holds nothing else, and so hides no module of the server's."""

__all__: list[str] = []  # its module needs vLLM, which nobody who reads the API reference has to install
