"""The core: what each kind of task means, arrays in and arrays out."""
