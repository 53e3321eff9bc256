// A device of its own, for machines without a GPU: its memory is the host's and the CPU does its work, but like a GPU it refuses to
// mix its tensors with the CPU's, and like MPS it has no double precision. Loaded by device.py, as PyTorch's "privateuse1" device.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace {

using Sizes = c10::SymIntArrayRef;
const auto KIND = c10::DeviceType::PrivateUse1;
const c10::Device HERE(KIND, 0);
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* p = malloc(n);
    return {p, p, &free, HERE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t n) const override { memcpy(to, from, n); }
} memory;

// the numbers of a CPU's generator
struct Random final : c10::GeneratorImpl {
  at::Generator cpu = at::detail::createCPUGenerator();
  Random() : c10::GeneratorImpl(HERE, KEYS) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_offset(uint64_t offset) override { cpu.set_offset(offset); }
  uint64_t get_offset() const override { return cpu.get_offset(); }
  void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
  Random* clone_impl() const override {
    auto* copy = new Random();
    copy->cpu = cpu.clone();
    return copy;
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Random>(); }
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::DeviceType::PrivateUse1;
  const c10::Stream stream = c10::Stream(c10::Stream::DEFAULT, HERE);
  c10::DeviceType type() const override { return KIND; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Device getDevice() const override { return HERE; }
  c10::Device exchangeDevice(c10::Device) const override { return HERE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream; }
  c10::Stream exchangeStream(c10::Stream) const override { return stream; }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

const bool started = [] {
  static Hooks hooks;
  c10::SetAllocator(KIND, &memory);
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

at::ScalarType known(std::optional<at::ScalarType> type) {
  auto found = c10::dtype_or_default(type);
  TORCH_CHECK(found != at::kDouble, "float64 is not known here");
  return found;
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> type) {
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, known(type));
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> type, std::optional<at::Layout>, std::optional<at::Device>,
                 std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, KEYS, known(type), format);
}

// the same memory as a tensor of the CPU
at::Tensor on_cpu(const at::Tensor& t) {
  auto options = t.options().device(at::kCPU).requires_grad(false);
  return t.numel() ? at::from_blob(t.data_ptr(), t.sizes(), t.strides(), [keep = t](void*) {}, options) : at::empty(t.sizes(), options);
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  (to.is_cpu() ? to : on_cpu(to)).copy_(from.is_cpu() ? from : on_cpu(from));
  return to;
}

at::Scalar local_scalar(const at::Tensor& t) { return on_cpu(t).item(); }

at::Tensor as_strided(const at::Tensor& t, Sizes size, Sizes stride, std::optional<c10::SymInt> offset) {
  auto start = offset ? std::make_optional(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

at::Tensor view(const at::Tensor& t, Sizes size) { return at::native::view(t, C10_AS_INTARRAYREF_SLOW(size)); }

at::Tensor reshape_alias(const at::Tensor& t, Sizes size, Sizes stride) {
  return at::native::_reshape_alias(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor& set_storage(at::Tensor& t, c10::Storage source, c10::SymInt offset, Sizes size, Sizes stride) {
  auto* impl = t.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  if (!stride.empty()) impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
  impl->set_storage_offset(offset.expect_int());
  return t;
}

at::Tensor& set_source(at::Tensor& t, c10::Storage source) {
  c10::SymInt n(static_cast<int64_t>(source.nbytes() / t.itemsize()));
  return set_storage(t, std::move(source), 0, Sizes(n), {});
}

void grow(const at::Tensor& t, c10::IntArrayRef size) {  // an output that was given empty
  auto made = at::detail::empty_generic(size, &memory, KEYS, t.scalar_type(), std::nullopt);
  t.unsafeGetTensorImpl()->set_storage_keep_dtype(made.storage());
  t.unsafeGetTensorImpl()->set_sizes_contiguous(size);
}

// all else is the CPU's operation on the same memory
void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  std::vector<std::pair<at::Tensor, at::Tensor>> known;  // here, and the same on the CPU
  std::string foreign;
  auto lend = [&](const at::Tensor& t, const std::string& name) -> at::Tensor {
    if (!t.defined()) return t;
    if (t.is_cpu()) {
      if (name == "index" || (t.dim() > 0 && name != "indices")) foreign = name;  // as on a GPU, which takes numbers, and x[indices]
      return t;
    }
    return known.emplace_back(t, on_cpu(t)).second;
  };
  auto take_back = [&](const at::Tensor& t) -> at::Tensor {
    if (!t.defined()) return t;
    for (auto& [here, cpu] : known) {
      if (!cpu.is_same(t)) continue;
      if (here.sizes() != t.sizes()) grow(here, t.sizes()), on_cpu(here).copy_(t);
      return here;
    }
    auto made = empty_strided(t.sizes(), t.strides(), t.scalar_type());
    on_cpu(made).copy_(t);
    return made;
  };
  auto first = stack->end() - schema.arguments().size();
  for (size_t i = 0; i < schema.arguments().size(); i++) {
    auto& v = *(first + i);
    const auto& name = schema.arguments()[i].name();
    if (v.isTensor()) {
      v = lend(v.toTensor(), name);
    } else if (v.isTensorList()) {
      std::vector<at::Tensor> lent;
      for (const auto& t : v.toTensorVector()) lent.push_back(lend(t, name));
      v = lent;
    } else if (v.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> lent;
      for (const auto& t : v.toOptionalTensorVector()) lent.push_back(t ? std::make_optional(lend(*t, name)) : t);
      v = lent;
    } else if (v.isDevice()) {
      v = c10::Device(at::kCPU);
    } else if (v.isGenerator()) {
      TORCH_CHECK(v.toGenerator().device() == HERE, schema.name(), " got a generator of ", v.toGenerator().device());
      v = v.toGenerator().get<Random>()->cpu;
    }
  }
  TORCH_CHECK(known.empty() || foreign.empty(), "Expected all tensors to be on the same device, but ", foreign, " of ", schema.name(),
              " is on the CPU");
  op.callBoxed(stack);
  for (auto v = stack->end() - schema.returns().size(); v != stack->end(); v++) {
    if (v->isTensor()) {
      *v = take_back(v->toTensor());
    } else if (v->isTensorList()) {
      std::vector<at::Tensor> taken;
      for (const auto& t : v->toTensorVector()) taken.push_back(take_back(t));
      *v = taken;
    }
  }
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", [](c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> type, std::optional<at::Layout>,
                             std::optional<at::Device>, std::optional<bool>) { return empty_strided(size, stride, type); });
  m.impl("_copy_from", &copy_from);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("set_.source_Storage", &set_source);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
}

}  // namespace
