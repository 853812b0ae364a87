"""What the notebooks show: pictures, texts as coloured tokens, and the checks of the exercises.

It imports `alpaca_helpers`, which never imports it.
"""
