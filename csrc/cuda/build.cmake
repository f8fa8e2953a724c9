# The CUDA library. One translation unit per storage and direction, so that they compile side by side.
list(TRANSFORM KD_KERNELS_CUDA_ARCHS APPEND "-real" OUTPUT_VARIABLE cuda_architectures)
set(cuda_ptx ${KD_KERNELS_CUDA_ARCHS})
list(FILTER cuda_ptx EXCLUDE REGEX "[a-z]$") # what has a letter runs on that GPU alone
if(cuda_ptx)
  list(SORT cuda_ptx COMPARE NATURAL ORDER DESCENDING)
  list(GET cuda_ptx 0 cuda_newest)
  list(APPEND cuda_architectures "${cuda_newest}-virtual")
endif()
set(CMAKE_CUDA_ARCHITECTURES ${cuda_architectures})
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

set(cuda_flags -fmad=false) # what is fused is fused by name: u_s - u_t must vanish where the models agree
if(KD_KERNELS_CUDA_STRICT)
  list(APPEND cuda_flags -Werror=all-warnings -Xptxas=-warn-spills "-Xcompiler=-Wall,-Wextra,-Werror")
endif()

add_library(kd_kernels_cuda SHARED csrc/cuda/library.cpp)
target_link_libraries(kd_kernels_cuda PRIVATE CUDA::cudart_static)
# The runtime's symbols are its own business, and libstdc++ is not needed.
target_link_options(kd_kernels_cuda PRIVATE -Wl,--exclude-libs,ALL)
target_compile_options(kd_kernels_cuda PRIVATE -Wall -Wextra)
foreach(storage Float32 Bfloat16 Float16 Mixed Wide)
  foreach(teacher 0 1)
    set(variant kd_kernels_cuda_${storage}_${teacher})
    add_library(${variant} OBJECT csrc/cuda/row_divergence.cu)
    target_compile_definitions(${variant} PRIVATE KD_STORAGE=${storage} KD_TEACHER=${teacher})
    target_compile_options(${variant} PRIVATE ${cuda_flags})
    set_target_properties(${variant} PROPERTIES CUDA_STANDARD 17 CUDA_VISIBILITY_PRESET hidden)
    target_sources(kd_kernels_cuda PRIVATE $<TARGET_OBJECTS:${variant}>)
  endforeach()
endforeach()
set_target_properties(kd_kernels_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
