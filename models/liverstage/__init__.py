"""Liver-stage Plasmodium in fluorescence: a U-Net with spatial dropout, trained here."""
