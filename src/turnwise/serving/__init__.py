"""A policy behind an OpenAI-compatible chat endpoint.

    shapes   requests checked, responses and errors in OpenAI's shape
    shown    what of the policy's text a client sees, also while it is being drawn
    talk     one request, played by the engine
    app      the HTTP server

The parts that need the extra `serve` are imported from `turnwise.serving.app`.
"""
