// The operators of schema.cpp as C++ calls them, through the dispatcher. Their signatures in C++ stand here once.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <string>

namespace dass {

// The families of operators, by what stands behind their names.
struct Native {
  static constexpr const char* suffix = "";
};
struct Emulated {
  static constexpr const char* suffix = "_emulated";
};
struct Triton {
  static constexpr const char* suffix = "_triton";
};

namespace signature {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

using ScanForward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                       const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                                       const OptionalTensor&, bool, const c10::List<bool>&, int64_t,
                                                       at::ScalarType);
using ScanBackward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
    const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, bool,
    const c10::List<bool>&, int64_t);
using Ss2dForward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                               const Tensor&, int64_t, at::ScalarType);
using Ss2dBackward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                                                const Tensor&, const Tensor&, const Tensor&,
                                                                                const Tensor&, const Tensor&, int64_t);

}  // namespace signature

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name, const char* suffix) {
  return c10::Dispatcher::singleton().findSchemaOrThrow((std::string("dass_ops::") + name + suffix).c_str(), "").typed<Signature>();
}

// Found at the first call: the families that Python defines do not exist when this file is loaded.
template <typename Family>
struct Operators {
  c10::TypedOperatorHandle<signature::ScanForward> scan_forward = find<signature::ScanForward>("scan_forward", Family::suffix);
  c10::TypedOperatorHandle<signature::ScanBackward> scan_backward = find<signature::ScanBackward>("scan_backward", Family::suffix);
  c10::TypedOperatorHandle<signature::Ss2dForward> ss2d_forward = find<signature::Ss2dForward>("ss2d_forward", Family::suffix);
  c10::TypedOperatorHandle<signature::Ss2dBackward> ss2d_backward = find<signature::Ss2dBackward>("ss2d_backward", Family::suffix);
};

template <typename Family>
const Operators<Family>& operators() {
  static const Operators<Family> found;
  return found;
}

}  // namespace dass
