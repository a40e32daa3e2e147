"""What the tests share: modules, data, fits, the journal of what was trained, and two processes over gloo.

A test module never imports from another test module: what two of them need lies here. The folder ``tests`` is on the path
(``pythonpath`` in pyproject.toml) and is no package, so a package called ``tests`` in site-packages does not matter.
"""
