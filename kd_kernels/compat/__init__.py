"""Other libraries' signatures over :func:`kd_kernels.distill`: arguments in, one call out.

``kd_kernels.compat.liger``, ``.trl``, ``.torchtune``, ``.automodel``, ``.modelopt``. None of those
libraries is imported or needed, except by ``compat.trl.use_in_*``, which change its trainers.
docs/compat.md lists what each covers, where its numbers differ and what it refuses.
"""
