//! The Llama family of models.
