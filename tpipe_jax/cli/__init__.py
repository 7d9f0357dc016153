"""The programs of the command line: `tpipe NAME` and `launch/NAME.py` are the same code."""
