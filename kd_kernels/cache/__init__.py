"""Teachers on disk: written once, read for every student. See docs/cache.md."""

from kd_kernels.cache.errors import CacheError
from kd_kernels.cache.reader import TeacherCache
from kd_kernels.cache.record import TeacherRecord
from kd_kernels.cache.writer import CacheWriter

__all__ = ["CacheError", "CacheWriter", "TeacherCache", "TeacherRecord"]
