"""The models: the DiT that is trained (``wan``) and the frozen encoders around it.

wan            the DiT, its table of parameters, how it is built and spread over ranks
vae            AutoencoderKLWan behind encode() and decode()       text_encoder   UMT5 and its tokenizer
conditioning   mask and latent channels of image-to-video          image_encoder  CLIP of Wan2.1 I2V
"""
