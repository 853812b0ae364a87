"""What one notebook alone uses: the checks of the exercises, and pictures of the notebooks that go further.

It imports `alpaca_helpers`, which never imports it.
"""
