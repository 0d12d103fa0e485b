"""Wire formats: one module for each, all behind ``forgejax.gateway.dialects.base.Dialect``."""
