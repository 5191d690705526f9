"""How much: this service and what people would use instead, on the same data, by one command (`make bench`)."""
