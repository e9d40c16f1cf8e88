"""The files that other programs need of a tuned model: GGUF for llama.cpp, a Modelfile for Ollama, a character card."""
