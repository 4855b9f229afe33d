# slim.sh ENVIRONMENT: take out of an environment what no program of ours runs.
set -eu
cd "$1"/lib/python3.*/site-packages
# Torch's own tests, tools and headers; torch_shm_manager is what it starts itself.
rm -rf torch/test torch/include torch/share/cmake
rm -f torch/lib/libbackend_with_compiler.so torch/lib/libjitbackend_test.so torch/lib/libtorchbind_test.so
[ ! -d torch/bin ] || find torch/bin -type f ! -name torch_shm_manager -delete
# Arrow's network servers and clients (tables here are files), and what it is linked with.
rm -rf pyarrow/include pyarrow/*flight* pyarrow/libarrow_s3.* pyarrow/_s3fs.*
rm -f pyarrow/libarrow*.so pyarrow/libarrow*.so.*.*
# Formats that no slide has (AVIF, and compressors of scientific arrays); sources of generated code.
rm -f imagecodecs/_avif.* imagecodecs/_sz3.* imagecodecs/_pcodec.*
rm -f imagecodecs.libs/libaom-* imagecodecs.libs/libavif-* imagecodecs.libs/libSZ3c-* imagecodecs.libs/libcpcodec-*
find . \( -name 'modular_*.py' -path './transformers/*' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.pyi' \) -delete
# Downloads from a model hub, and installing for Flower's apps: both are switched off.
rm -rf hf_xet hf_xet-*.dist-info
rm -f "$1"/bin/uv "$1"/bin/uvx
find . -type d \( -name tests -o -name __pycache__ \) -prune -exec rm -rf {} +
# Names for debuggers. What auditwheel has laid out anew (*.libs) and CUDA stay as they are.
find . \( -name '*.so' -o -name '*.so.*' \) -type f ! -path '*.libs/*' ! -path './nvidia/*' \
    ! -path './triton/*' -exec strip --strip-unneeded {} +
