"""What one notebook alone uses: its pictures, and the checks of its exercises.

It imports `alpaca_helpers`, which never imports it.
"""
