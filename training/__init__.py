"""Makes ``fixtures/trained``: a small OLMo that has learned real text. ``python -m training``.

Not part of the wheel: the wheel carries what is made here, this makes it from the checkout alone.
"""
