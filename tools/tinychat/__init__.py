"""How the bundled tiny chat model is made: tokenizer, training, measurements, model card."""
