"""The EAGLE-3 and 3.1 draft, with grouped-query or latent attention."""
