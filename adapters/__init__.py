"""What the tracer cannot find out by itself about a model family: one small declarative file each.

The folder is installed as ``ssmquant.adapters``. Its files import nothing of the library but ``ssmquant.adapter``, and
importing this package registers nothing: adapters are looked up by name when one is needed.
"""
