"""What the notebooks show, and what one of them alone does.

`plots`, `pictures` and `token_boxes` draw, `dataset` is what notebook 02 does, `exercises` checks what readers write.

It imports `alpaca_helpers`, which never imports it.
"""
