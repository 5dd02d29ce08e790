"""From a request in our types to the core and back to text: validation, tokenization, detokenization. No torch."""
