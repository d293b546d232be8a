"""Turn credit inside other trainers: one module per trainer, and what they share. None is imported before it is asked for.

`rows` turns what a trainer holds into turn credit and back, without any framework; `doctor` says what is missing.
"""
