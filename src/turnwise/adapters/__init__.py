"""Turn credit inside other trainers: one module per trainer, and what they share; each is imported when asked for.

`rows` turns what a trainer holds into turn credit and back, without any framework; `doctor` says what is missing.
"""
