"""What is built on the core, a file a question."""
