"""Real codebases, unmodified, against the library: opt-in, since their code is not ours to ship.

Put checkouts into one folder, under their repositories' names (``families.py`` lists owner, name and the revision that
was tested), and say where it is:

    git clone https://github.com/csguoh/MambaIR checkouts/MambaIR        # and others, as many as you like
    pip install timm torchvision einops fvcore monai transformers        # what their code imports
    SSMQUANT_UPSTREAM=checkouts pytest tests/upstream -n 2                # a family without checkout is skipped

No CUDA is needed: their compiled kernels are stood in for by ``ssmquant.install_standins()``. Each family runs in a
process of its own, because the names of their modules (``models``, ``mamba_ssm``, ``utils``) collide. One by hand:

    SSMQUANT_UPSTREAM=checkouts python -m tests.upstream.run vim_tiny small --out runs/upstream/vim_tiny.small.json

``SSMQUANT_UPSTREAM_RESULTS=runs/upstream`` keeps the result files of a pytest run, and ``python -m
tests.upstream.table runs/upstream`` writes the table of docs/families.md from them.

``loaders/`` holds what it takes to import each codebase (no model code), ``checks.py`` what is asked of every family.
"""
