"""torch.fx: from a foreign model to quantized modules.

``tracer`` records, ``trace`` decides at which sizes, ``sites`` finds what can be quantized, ``plan`` decides how,
``rewrite`` writes the quantized graph, ``regions`` makes it a function, ``runtime`` picks the graph for a call.
"""
