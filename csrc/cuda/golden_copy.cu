// Golden tests of copy.h and vector.h.
#include "cuda/device/barrier.h"
#include "cuda/device/copy.h"
#include "cuda/device/thread.h"
#include "cuda/device/vector.h"
#include "cuda/golden_case.h"

namespace lmkern::cuda {
namespace {

// Byte i of the source; never 0, which is what an invalid one becomes.
std::uint8_t coded_byte(std::size_t i) { return static_cast<std::uint8_t>(1 + i * 37 % 251); }

std::vector<std::uint8_t> coded_bytes(std::size_t count) {
  std::vector<std::uint8_t> bytes(count);
  for (std::size_t i = 0; i < count; ++i) bytes[i] = coded_byte(i);
  return bytes;
}

// Thread i copies kBytes, of which i % (kBytes + 1) are valid, to the place of thread 63 - i.
//
// registers: 48, spills: 0
template <int kBytes>
LMKERN_KERNEL(64, 1)
copies(const std::uint8_t* in, std::uint8_t* out) {
  auto* const s = shared_memory<std::uint8_t>();
  const int i = thread_index(), to = (63 - i) * kBytes;
  for (int b = 0; b < kBytes; ++b) s[to + b] = 0xee;
  copy_async<kBytes>(s + to, in + i * kBytes, i % (kBytes + 1));
  copy_commit();
  copy_wait<0>();
  block_barrier();
  for (int b = 0; b < kBytes; ++b) out[i * kBytes + b] = s[i * kBytes + b];
}

// PTX 9.7.9.25.3.1: what is beyond src-size is filled with zeros.
template <int kBytes>
std::string run_copies() {
  DeviceBuffer<std::uint8_t> in(coded_bytes(64 * kBytes)), out(64 * kBytes);
  launch<copies<kBytes>>({.threads = 64, .shared_bytes = 64 * kBytes}, Stream{},
                         static_cast<const std::uint8_t*>(in.data()), out.data());
  std::vector<std::uint8_t> expected;
  for (int i = 0; i < 64; ++i)
    for (int b = 0; b < kBytes; ++b) {
      const int from = 63 - i, valid = from % (kBytes + 1);
      expected.push_back(b < valid ? coded_byte(static_cast<std::size_t>(from * kBytes + b)) : 0);
    }
  return first_difference(expected, out.values(), by("copy", kBytes, "byte"));
}

// Rows that do not exist have no address.
//
// registers: 32, spills: 0
LMKERN_KERNEL(32, 1)
masked_rows(const float* in, float* out) {
  float* const s = shared_memory<float>();
  const int i = thread_index();
  const bool valid = i % 3 != 0;
  copy_async<16>(s + 4 * i, valid ? in + 4 * i : nullptr, valid ? 16 : 0);
  copy_commit();
  copy_wait<0>();
  for (int c = 0; c < 4; ++c) out[4 * i + c] = s[4 * i + c];
}

std::string run_masked_rows() {
  std::vector<float> rows, expected;
  for (int i = 0; i < 32; ++i)
    for (int c = 0; c < 4; ++c) {
      rows.push_back(static_cast<float>(1000 * i + c + 1));
      expected.push_back(i % 3 != 0 ? rows.back() : 0.0f);
    }
  DeviceBuffer<float> in(rows), out(32 * 4);
  launch<masked_rows>({.threads = 32, .shared_bytes = 32 * 16}, Stream{},
                      static_cast<const float*>(in.data()), out.data());
  return first_difference(expected, out.values(), by("row", 4, "column"));
}

// Four groups; those that were waited for are read before the others are.
//
// registers: 32, spills: 0
LMKERN_KERNEL(64, 1)
copy_groups(const float* in, float* out) {
  float* const s = shared_memory<float>();
  const int i = thread_index();
  LMKERN_UNROLL
  for (int group = 0; group < 4; ++group) {
    copy_async<4>(s + 64 * group + i, in + 64 * group + i);
    if (group == 2) copy_async<4>(s + 256 + i, in + 256 + i);  // two in one group
    copy_commit();
  }
  float* const o = out + 5 * i;
  copy_wait<3>();
  o[0] = s[i];
  copy_wait<2>();
  o[1] = s[64 + i];
  copy_wait<1>();
  o[2] = s[128 + i];
  o[3] = s[256 + i];
  copy_commit();  // an empty group counts, too
  copy_wait<1>();
  o[4] = s[192 + i];
}

std::string run_copy_groups() {
  std::vector<float> rows, expected;
  for (int group = 0; group < 5; ++group)
    for (int i = 0; i < 64; ++i) rows.push_back(static_cast<float>(1000 * group + i));
  for (int i = 0; i < 64; ++i)
    for (int group : {0, 1, 2, 4, 3}) expected.push_back(static_cast<float>(1000 * group + i));
  DeviceBuffer<float> in(rows), out(64 * 5);
  launch<copy_groups>({.threads = 64, .shared_bytes = 5 * 64 * sizeof(float)}, Stream{},
                      static_cast<const float*>(in.data()), out.data());
  return first_difference(expected, out.values(), by("thread", 5, "read"));
}

// registers: 32, spills: 0
template <class S, int kCount>
LMKERN_KERNEL(32, 1)
vectors(const S* in, S* out) {
  using V = Vector<S, kCount>;
  const int i = thread_index();
  V value = load_vector<V>(in + i * kCount);
  auto* const s = shared_memory<S>();
  store_vector(s + (31 - i) * kCount, value);
  block_barrier();
  value = load_vector<V>(static_cast<const S*>(s + i * kCount));
  const S first = value.at[0];
  for (int c = 0; c + 1 < kCount; ++c) value.at[c] = value.at[c + 1];
  value.at[kCount - 1] = first;
  store_vector(out + i * kCount, value);
}

// Each vector arrives whole, its elements in their order: here rotated by one.
template <class S, int kCount>
std::string run_vectors() {
  const std::size_t bytes = sizeof(S) * kCount;
  const std::vector<std::uint8_t> source = coded_bytes(32 * bytes);
  std::vector<S> values(32 * kCount);
  std::memcpy(static_cast<void*>(values.data()), source.data(), source.size());
  DeviceBuffer<S> in(values), out(32 * kCount);
  launch<vectors<S, kCount>>({.threads = 32, .shared_bytes = 32 * bytes}, Stream{},
                             static_cast<const S*>(in.data()), out.data());
  const std::vector<S> result = out.values();
  std::vector<std::uint8_t> expected, got(source.size());
  std::memcpy(got.data(), static_cast<const void*>(result.data()), got.size());
  for (std::size_t i = 0; i < 32; ++i)
    for (std::size_t b = 0; b < bytes; ++b)
      expected.push_back(source[(31 - i) * bytes + (b + sizeof(S)) % bytes]);
  return first_difference(expected, got, by("vector", static_cast<int>(bytes), "byte"));
}

}  // namespace

std::vector<GoldenCase> copy_goldens() {
  return {
      {"copy_async.4", run_copies<4>},
      {"copy_async.8", run_copies<8>},
      {"copy_async.16", run_copies<16>},
      {"copy_async.masked_rows", run_masked_rows},
      {"copy_async.groups", run_copy_groups},
      {"vector.float.4", run_vectors<float, 4>},
      {"vector.float.2", run_vectors<float, 2>},
      {"vector.double.2", run_vectors<double, 2>},
      {"vector.bfloat16.8", run_vectors<bfloat16, 8>},
      {"vector.bfloat16.4", run_vectors<bfloat16, 4>},
      {"vector.float16.2", run_vectors<float16, 2>},
  };
}

}  // namespace lmkern::cuda
