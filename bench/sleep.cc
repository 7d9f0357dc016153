// An operation for XLA on CPUs that waits: (x, seconds) -> x, float32 scalars. bench/emulated.py
// compiles and loads it.

#include <chrono>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Scalar = ffi::BufferR0<ffi::F32>;

static ffi::Error SleepImpl(Scalar x, Scalar seconds, ffi::Result<Scalar> result) {
  std::this_thread::sleep_for(std::chrono::duration<float>(*seconds.typed_data()));
  *result->typed_data() = *x.typed_data();
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    Sleep, SleepImpl, ffi::Ffi::Bind().Arg<Scalar>().Arg<Scalar>().Ret<Scalar>());
