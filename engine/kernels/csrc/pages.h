// Memory straight from the system.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

namespace seraph {

// Zeroed memory in huge pages where the system gives them; pages are taken when first written, on the NUMA node of the
// thread that does so.
class Pages {
  public:
    explicit Pages(int64_t bytes) : bytes_(static_cast<size_t>(bytes)) {
        if (bytes_ == 0)
            return;
        data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (data_ == MAP_FAILED)
            throw std::bad_alloc();
        madvise(data_, bytes_, MADV_HUGEPAGE);
    }
    ~Pages() {
        if (data_)
            munmap(data_, bytes_);
    }
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;
    template <class T>
    T* as() const {
        return static_cast<T*>(data_);
    }

  private:
    void* data_ = nullptr;
    size_t bytes_;
};

} // namespace seraph
