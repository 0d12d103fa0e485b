"""The program behind ``scripts/serve.py``: one engine for other processes."""
