"""torch.fx: from a foreign model to quantized modules.

``tracer`` records (with ``calls``, what it knows of torch calls, and ``writer``, which writes nodes), ``patches`` is
what is patched meanwhile, ``trace`` decides at which sizes, ``sites`` finds what can be quantized, ``plan`` decides
how, ``rewrite`` writes the quantized graph, ``regions`` makes it a function, ``runtime`` picks the graph for a call,
``prepared`` makes the user's model an instance of a class that asks it.
"""
