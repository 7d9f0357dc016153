"""Turns text into token shards to train on, in parallel. The same as `tpipe tokenize`."""

import sys

if __name__ == "tokenize":
    # Python's own module of this name is looked for in this folder first, by each script of it.
    from importlib.util import module_from_spec, spec_from_file_location
    from sysconfig import get_path

    spec = spec_from_file_location("tokenize", f"{get_path('stdlib')}/tokenize.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules["tokenize"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["tokenize"])

if __name__ == "__main__":
    from tpipe_jax.cli.main import run

    sys.exit(run("tokenize", sys.argv[1:]))
