// Two CUDA devices that are not there. On a CPU build of PyTorch the dispatch key CUDA has no kernels; here it gets
// some: tensors on it have real numbers in host memory, and every operation is checked as CUDA would check it (all
// tensors on one device) and then computed by the CPU's kernel on the same memory. Copies, waits and launches are
// counted; inside a capture what a CUDA graph refuses is refused.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <set>

namespace {

using at::Tensor;
using Sizes = at::IntArrayRef;

constexpr int kDevices = 2;
thread_local int current = 0;
thread_local bool capturing = false;
std::atomic<int> captures{0};  // of all threads

std::mutex lock;  // over what follows: autograd computes in threads of its own
std::map<std::string, int64_t> counts;  // "launch NAME", "to device NAME", "to host NAME", "wait NAME", ...
int64_t allocated[kDevices] = {}, peak[kDevices] = {};
int64_t limit = int64_t(16) << 30;

void count(const std::string& what) {
  std::lock_guard<std::mutex> guard(lock);
  counts[what]++;
}

void refuse_in_capture(const std::string& name, const char* why) {
  TORCH_CHECK(!capturing, "CUDA error: operation not permitted when stream is capturing (", name, ": ", why, ")");
}

void wait(const std::string& name) {
  refuse_in_capture(name, "it waits for the device");
  count("wait " + name);
}

// ------------------------------------------------------------------ what PyTorch asks of a device

c10::Stream queue(c10::Device device) { return c10::Stream(c10::Stream::DEFAULT, device); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    uncheckedSetDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {c10::kCUDA, c10::DeviceIndex(current)}; }
  void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) current = device.index();
  }
  c10::Stream getStream(c10::Device device) const override { return queue(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return queue(device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return queue(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  // There is one queue, which is always done.
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
c10::impl::DeviceGuardImplRegistrar registered_guard(c10::kCUDA, new Guard());

// It draws what the CPU's draws; the CPU's kernels take it while its device is the CPU.
struct Generator final : at::CPUGeneratorImpl {
  explicit Generator(int device) {
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::CUDA);
    place({c10::kCUDA, c10::DeviceIndex(device)});
  }
  void place(c10::Device device) { device_ = device; }
};

struct CUDAHooks final : at::CUDAHooksInterface {  // PyTorch looks for this name, once, when it is loaded
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex current_device() const override { return current; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  int getNumGPUs() const override { return kDevices; }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return at::make_generator<Generator>(index < 0 ? current : index);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

// ------------------------------------------------------------------ memory

struct Block {
  int device;
  size_t bytes;
  void* data;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  std::lock_guard<std::mutex> guard(lock);
  allocated[block->device] -= int64_t(block->bytes);
  free(block->data);
  delete block;
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override { return on(current, bytes); }
  c10::DataPtr on(int device, size_t bytes) {
    std::lock_guard<std::mutex> guard(lock);
    bool fits = allocated[device] + int64_t(bytes) <= limit;
    if (!fits) counts["out of memory"]++;
    TORCH_CHECK_WITH(OutOfMemoryError, fits, "CUDA out of memory. Tried to allocate ", bytes, " bytes.");
    void* data = nullptr;
    TORCH_CHECK(!posix_memalign(&data, 64, std::max<size_t>(bytes, 1)), "the host is out of memory");
    memset(data, 0xff, bytes);  // NaN in every float: nothing may be read before it is written
    allocated[device] += int64_t(bytes);
    peak[device] = std::max(peak[device], allocated[device]);
    return {data, new Block{device, bytes, data}, &release, c10::Device(c10::kCUDA, c10::DeviceIndex(device))};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
};
Memory memory;

c10::Storage new_storage(size_t bytes, int device) {
  return {c10::Storage::use_byte_size_t(), bytes, memory.on(device, bytes), &memory, true};
}

bool on_device(const Tensor& t) { return t.defined() && t.device().is_cuda(); }

void lie(const Tensor& t, Sizes size, Sizes stride, int64_t offset = 0) {
  t.unsafeGetTensorImpl()->set_storage_offset(offset);
  t.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
}

Tensor tensor_on_cpu(c10::Storage storage, const Tensor& like) {
  auto keys = c10::DispatchKeySet(c10::DispatchKey::CPU);
  auto out = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, like.dtype());
  lie(out, like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) out.unsafeGetTensorImpl()->set_wrapped_number(true);
  return out;
}

// The same memory as a tensor of the CPU, which keeps it alive.
Tensor twin(const Tensor& t) {
  auto storage = t.storage();
  auto owner = [](void* held) { delete static_cast<c10::Storage*>(held); };
  c10::DataPtr data(storage.mutable_data(), new c10::Storage(storage), owner, c10::kCPU);
  auto bytes = c10::Storage::use_byte_size_t();
  return tensor_on_cpu({bytes, storage.nbytes(), std::move(data), c10::GetAllocator(c10::kCPU), true}, t);
}

Tensor tensor_on_device(c10::Storage storage, caffe2::TypeMeta type, Sizes size, Sizes stride, int64_t offset) {
  auto keys = c10::DispatchKeySet({c10::DispatchKey::CUDA, c10::DispatchKey::AutogradCUDA});
  auto out = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, type);
  lie(out, size, stride, offset);
  return out;
}

// ------------------------------------------------------------------ every operation that computes

std::string name_of(const c10::OperatorHandle& op) {
  auto name = op.schema().operator_name();
  auto plain = name.name.substr(name.name.rfind(':') + 1);
  return name.overload_name.empty() ? plain : plain + "." + name.overload_name;
}

bool has_tag(const c10::OperatorHandle& op, at::Tag tag) {
  auto tags = op.getTags();
  return std::find(tags.begin(), tags.end(), tag) != tags.end();
}

bool begins(const std::string& name, const char* with) { return name.rfind(with, 0) == 0; }

struct Arguments {
  std::vector<std::pair<Tensor, Tensor>> twins;  // of the device, and as the CPU sees it
  std::set<int> devices;
  std::vector<std::pair<at::Generator, c10::Device>> generators;  // and where they are
  bool host_tensor = false, host_number = false;
  std::optional<c10::Device> asked;

  ~Arguments() {
    for (auto& [generator, device] : generators) generator.get<Generator>()->place(device);
  }

  // Tensors that share memory on the device share it on the CPU.
  Tensor take(const Tensor& t) {
    if (!t.defined()) return t;
    if (!on_device(t)) {
      (t.dim() || !t.numel() ? host_tensor : host_number) = true;
      return t;
    }
    devices.insert(t.device().index());
    for (auto& [own, cpu] : twins)
      if (own.is_same(t)) return cpu;
    auto storage = t.storage().unsafeGetStorageImpl();
    for (auto& [own, cpu] : twins)
      if (own.storage().unsafeGetStorageImpl() == storage)
        return twins.emplace_back(t, tensor_on_cpu(cpu.storage(), t)).second;
    return twins.emplace_back(t, twin(t)).second;
  }

  c10::IValue lower(const c10::IValue& value) {
    if (value.isTensor()) return take(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> out;
      for (const Tensor& t : value.toTensorVector()) out.push_back(take(t));
      return out;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> out;
      for (const std::optional<Tensor>& t : value.toOptionalTensorList())
        out.push_back(t ? std::optional<Tensor>(take(*t)) : std::nullopt);
      return out;
    }
    if (value.isDevice()) {
      asked = value.toDevice();
      return c10::Device(c10::kCPU);
    }
    if (value.isGenerator() && value.toGenerator().defined()) {
      auto generator = value.toGenerator();
      TORCH_CHECK(generator.device().is_cuda(), "Expected a 'cuda' device type for generator but found 'cpu'");
      devices.insert(generator.device().index());
      generators.emplace_back(generator, generator.device());
      generator.get<Generator>()->place(c10::kCPU);
    }
    return value;
  }

  // Those that this library uses or might: PyTorch's list of what has no deterministic kernel on CUDA is longer.
  void check_deterministic(const std::string& name) const {
    bool floating = !twins.empty() && twins[0].first.is_floating_point();
    if (begins(name, "median.dim") || begins(name, "kthvalue") || begins(name, "histc") || begins(name, "put_") ||
        (floating && begins(name, "cumsum")))
      at::globalContext().alertNotDeterministic(name + " on CUDA");
  }

  // Numbers of no dimension may stay on the host beside what is computed element by element; indices too, at a wait.
  void check(const c10::OperatorHandle& op, const std::string& name) const {
    const char* unlike = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and ";
    TORCH_CHECK(devices.size() <= 1, unlike, "cuda:1! (", name, ")");
    bool indexing = begins(name, "index.") || begins(name, "index_put") || begins(name, "_index_put");
    if (!devices.empty() && host_tensor) {
      TORCH_CHECK(indexing, unlike, "cpu! (", name, ")");
      wait(name + " by indices of the host");
    }
    if (!devices.empty() && host_number) {
      bool filling = name.find("fill") != std::string::npos || begins(name, "where") || begins(name, "lerp");
      bool allowed = indexing || filling || begins(name, "_foreach") || has_tag(op, at::Tag::pointwise);
      TORCH_CHECK(allowed, unlike, "cpu, a number! (", name, ")");
    }
    if (has_tag(op, at::Tag::data_dependent_output) || has_tag(op, at::Tag::dynamic_output_shape)) wait(name);
    if (has_tag(op, at::Tag::nondeterministic_seeded)) refuse_in_capture(name, "it draws from no generator of a graph");
  }

  int device() const {
    if (!devices.empty()) return *devices.begin();
    return asked && asked->has_index() ? asked->index() : current;
  }

  // What was given by out= may have another size now.
  void resize(const std::vector<std::vector<int64_t>>& before, const std::string& name) {
    for (size_t i = 0; i < twins.size(); i++) {
      auto& [own, cpu] = twins[i];
      if (cpu.sizes() == Sizes(before[i])) continue;
      if (own.numel()) refuse_in_capture(name, "it resizes a tensor");  // an empty one is a result to be made
      if (cpu.storage().data() != own.storage().data()) {
        auto storage = new_storage(cpu.storage().nbytes(), device());
        memcpy(storage.mutable_data(), cpu.storage().data(), storage.nbytes());
        own.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
      }
      lie(own, cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }
  }

  // A result as a tensor of the device: an argument, a view of one, or new.
  Tensor lift(const Tensor& result) const {
    if (!result.defined()) return result;
    for (auto& [own, cpu] : twins)
      if (cpu.is_same(result)) return own;
    auto place = [&](c10::Storage storage) {
      return tensor_on_device(std::move(storage), result.dtype(), result.sizes(), result.strides(), result.storage_offset());
    };
    for (auto& [own, cpu] : twins)
      if (result.storage().nbytes() && result.storage().data() == cpu.storage().data()) return place(own.storage());
    auto storage = new_storage(result.storage().nbytes(), device());
    memcpy(storage.mutable_data(), result.storage().data(), storage.nbytes());
    return place(std::move(storage));
  }
};

void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto name = name_of(op);
  Arguments arguments;
  auto given = op.schema().arguments().size(), returned = op.schema().returns().size();
  for (auto value = stack->end() - given; value != stack->end(); value++) *value = arguments.lower(*value);
  arguments.check(op, name);
  arguments.check_deterministic(name);
  std::vector<std::vector<int64_t>> sizes;
  for (auto& [own, cpu] : arguments.twins) sizes.push_back(cpu.sizes().vec());
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  arguments.resize(sizes, name);
  count("launch " + name);
  if (arguments.asked && arguments.asked->is_cpu()) return;
  for (auto value = stack->end() - returned; value != stack->end(); value++) {
    if (value->isTensor()) {
      *value = arguments.lift(value->toTensor());
    } else if (value->isTensorList()) {
      c10::List<Tensor> out;
      for (const Tensor& t : value->toTensorVector()) out.push_back(arguments.lift(t));
      *value = out;
    }
  }
}

// ------------------------------------------------------------------ what is not computed: memory, views, copies

std::vector<int64_t> dense(Sizes size) {
  std::vector<int64_t> stride(size.size());
  int64_t step = 1;
  for (size_t i = size.size(); i-- > 0; step *= std::max<int64_t>(size[i], 1)) stride[i] = step;
  return stride;
}

Tensor empty_strided(Sizes size, Sizes stride, std::optional<at::ScalarType> dtype, std::optional<c10::Layout>,
                     std::optional<c10::Device> device, std::optional<bool>) {
  auto type = c10::scalarTypeToTypeMeta(dtype.value_or(at::get_default_dtype_as_scalartype()));
  int index = device && device->has_index() ? device->index() : current;
  TORCH_CHECK(index < kDevices, "CUDA error: invalid device ordinal");
  auto bytes = at::detail::computeStorageNbytes(size, stride, type.itemsize());
  return tensor_on_device(new_storage(bytes, index), type, size, stride, 0);
}

Tensor empty(Sizes size, std::optional<at::ScalarType> dtype, std::optional<c10::Layout> layout,
             std::optional<c10::Device> device, std::optional<bool> pinned, std::optional<at::MemoryFormat>) {
  return empty_strided(size, dense(size), dtype, layout, device, pinned);
}

Tensor& copy(Tensor& self, const Tensor& source, bool) {
  bool from = on_device(source), to = on_device(self);
  if (from != to) refuse_in_capture("copy_", "pageable memory of the host");
  count(from == to ? "launch copy_" : std::string(to ? "to device " : "to host ") + c10::toString(self.scalar_type()));
  at::AutoDispatchBelowADInplaceOrView below;
  (to ? twin(self) : self).copy_(from ? twin(source) : source);
  return self;
}

at::Scalar number(const Tensor& self) {
  wait("_local_scalar_dense");
  return twin(self).item();
}

bool is_set_to(const Tensor& a, const Tensor& b) {
  return a.storage().unsafeGetStorageImpl() == b.storage().unsafeGetStorageImpl() && a.sizes() == b.sizes() &&
         a.strides() == b.strides() && a.storage_offset() == b.storage_offset();
}

Tensor& set_storage(Tensor& self, at::Storage source, int64_t offset, Sizes size, Sizes stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  lie(self, size, stride.empty() ? Sizes(dense(size)) : stride, offset);
  return self;
}

Tensor& set_whole(Tensor& self, at::Storage source) {
  int64_t size = int64_t(source.nbytes() / self.dtype().itemsize());
  return set_storage(self, std::move(source), 0, {size}, {});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

const Tensor& resize(const Tensor& self, Sizes size, std::optional<at::MemoryFormat>) {
  refuse_in_capture("resize_", "it moves a tensor");
  auto stride = dense(size);
  auto bytes = at::detail::computeStorageNbytes(size, stride, self.dtype().itemsize(), self.storage_offset());
  if (bytes > self.storage().nbytes()) {
    auto storage = new_storage(bytes, self.device().index());
    memcpy(storage.mutable_data(), self.storage().data(), self.storage().nbytes());
    self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  }
  lie(self, size, stride, self.storage_offset());
  return self;
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  // PyTorch would choose a kernel of CUDA's own in it.
  for (auto name : {"convolution", "convolution_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&compute>());
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy);
  m.impl("_local_scalar_dense", number);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("resize_", resize);
  m.impl("is_set_to", is_set_to);
  m.impl("set_.source_Storage", set_whole);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
}

int registered_memory = (c10::SetAllocator(c10::kCUDA, &memory), 0);

}  // namespace

// ------------------------------------------------------------------ what Python asks

extern "C" {

// Lines of "COUNT WHAT", as of now.
const char* simulated_counts() {
  static std::string text;
  std::lock_guard<std::mutex> guard(lock);
  text.clear();
  for (auto& [what, times] : counts) text += std::to_string(times) + " " + what + "\n";
  return text.c_str();
}

void simulated_count(const char* what) { count(what); }

void simulated_forget() {
  std::lock_guard<std::mutex> guard(lock);
  counts.clear();
  for (int i = 0; i < kDevices; i++) peak[i] = allocated[i];
}

void simulated_set_capturing(int on) { captures += on - capturing, capturing = on; }
int simulated_capturing() { return capturing; }
int simulated_captures() { return captures; }
int64_t simulated_allocated(int device) { return allocated[device]; }
int64_t simulated_peak(int device) { return peak[device]; }
void simulated_reset_peak(int device) { peak[device] = allocated[device]; }
void simulated_set_limit(int64_t bytes) { limit = bytes; }
int64_t simulated_limit() { return limit; }
int simulated_device() { return current; }
void simulated_set_device(int device) { current = device; }
int simulated_devices() { return kDevices; }
}
