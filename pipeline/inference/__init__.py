"""What trained weights are used for: text generation, evaluation and export to other libraries."""
