"""Quotas: the kernel warns (VFS_DQUOT), people are told."""
