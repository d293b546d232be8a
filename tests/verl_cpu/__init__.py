"""What the tests need to run verl without an accelerator: a platform, and an inference server."""
