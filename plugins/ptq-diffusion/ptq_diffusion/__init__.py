"""ptq-diffusion: post-training quantization of diffusion models, on ptqcore."""
