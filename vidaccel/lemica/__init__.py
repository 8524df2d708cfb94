"""LeMiCa: which denoising steps to compute, decided offline from measured segment errors."""
