// NCCL between processes of one machine on null GPUs: each collective waits for its ranks and is done when it returns.
// Data goes through files in shared memory, one for each rank, and one for each message from a rank to another.
#include <fcntl.h>
#include <nccl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#define NCCL(name, ...) extern "C" ncclResult_t name(__VA_ARGS__)
#define NOT_HERE(name)                                \
    extern "C" int null_##name() __asm__(#name);      \
    int null_##name() { return ncclInvalidUsage; }
#define NOTHING(name)                            \
    extern "C" int null_##name() __asm__(#name); \
    int null_##name() { return 0; }

struct ncclComm {
    std::string path;
    int rank, size;
    std::atomic<long>* arrived;  // of each rank, in shared memory
    long barriers = 0;
    std::vector<int> files;
    std::map<int, long> sent, received;  // messages so far, by peer

    std::string of(const std::string& what) { return path + "." + what; }

    ncclComm(const char* id, int size, int rank) : path(id), rank(rank), size(size) {
        int f = open(path.c_str(), O_RDWR | O_CREAT, 0600);
        if (ftruncate(f, 4096)) abort();
        arrived = (std::atomic<long>*)mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, f, 0);
        close(f);
        for (int r = 0; r < size; r++) files.push_back(open(of(std::to_string(r)).c_str(), O_RDWR | O_CREAT, 0600));
        barrier();
        if (!rank) unlink(path.c_str());
        unlink(of(std::to_string(rank)).c_str());
    }

    ~ncclComm() {
        for (int f : files) close(f);
        munmap(arrived, 4096);
    }

    void barrier() {
        arrived[rank] = ++barriers;
        for (int r = 0; r < size; r++)
            while (arrived[r] < barriers) usleep(20);
    }

    // FAKE_CUDA_COPIES=0: only small data is carried, as in driver.cpp
    static size_t carried(size_t n) {
        const char* text = getenv("FAKE_CUDA_COPIES");
        return n < 1 << 20 || !text || atoi(text) ? n : 0;
    }

    // every rank shows n bytes; `take` reads what it wants of them: (rank, at, to, n)
    using Read = std::function<void(int, size_t, void*, size_t)>;
    void exchange(const void* mine, size_t n, std::function<void(Read)> take) {
        transfer(files[rank], 0, (void*)mine, carried(n), pwrite);
        barrier();
        if (carried(n) || !n)
            take([this](int r, size_t at, void* to, size_t n) { transfer(files[r], at, to, n, pread); });
        barrier();
    }

    template <class F>
    static void transfer(int file, size_t at, void* p, size_t n, F move) {
        while (n) {
            ssize_t done = move(file, p, n, at);
            if (done <= 0) perror("null NCCL"), abort();
            p = (char*)p + done, at += done, n -= done;
        }
    }
};

namespace {
std::map<int, double> scales;  // of ncclRedOpCreatePreMulSum
thread_local int depth = 0;
thread_local std::vector<std::function<void()>> sends, receives;

size_t size_of(ncclDataType_t t) {
    return t == ncclFloat64 || t == ncclInt64 || t == ncclUint64                      ? 8
           : t == ncclFloat32 || t == ncclInt32 || t == ncclUint32                    ? 4
           : t == ncclBfloat16 || t == ncclFloat16                                    ? 2
                                                                                      : 1;
}

float bf16(const void* p) {
    unsigned bits = *(unsigned short*)p << 16;
    float f;
    return memcpy(&f, &bits, 4), f;
}

double number(const char* p, ncclDataType_t t) {
    switch (t) {
        case ncclFloat64: return *(double*)p;
        case ncclFloat32: return *(float*)p;
        case ncclFloat16: return *(_Float16*)p;
        case ncclBfloat16: return bf16(p);
        case ncclInt64: return *(long*)p;
        case ncclInt32: return *(int*)p;
        case ncclUint8: return *(unsigned char*)p;
        case ncclInt8: return *(signed char*)p;
        default: fprintf(stderr, "null NCCL: numbers of type %d\n", t), abort();
    }
}

void put(char* p, ncclDataType_t t, double v) {
    switch (t) {
        case ncclFloat64: *(double*)p = v; return;
        case ncclFloat32: *(float*)p = v; return;
        case ncclFloat16: *(_Float16*)p = v; return;
        case ncclInt64: *(long*)p = v; return;
        case ncclInt32: *(int*)p = v; return;
        case ncclUint8: *(unsigned char*)p = v; return;
        case ncclInt8: *(signed char*)p = v; return;
        default: break;
    }
    float f = v;  // bf16, to the nearest
    unsigned bits;
    memcpy(&bits, &f, 4);
    *(unsigned short*)p = std::isnan(f) ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// n numbers from `at` on, of all ranks, added up in the order of ranks
void reduce(ncclComm_t c, ncclComm::Read& read, size_t at, void* to, size_t n, ncclDataType_t t, int op) {
    const size_t s = size_of(t), piece = 1 << 20;
    std::vector<char> part(piece * s);
    std::vector<double> sum(piece);
    for (size_t begin = 0; begin < n; begin += piece) {
        size_t m = std::min(piece, n - begin);
        for (int r = 0; r < c->size; r++) {
            read(r, (at + begin) * s, part.data(), m * s);
            for (size_t i = 0; i < m; i++) {
                double v = number(&part[i * s], t) * (op >= ncclNumOps ? scales[op] : 1), &a = sum[i];
                a = !r               ? v
                    : op == ncclProd ? a * v
                    : op == ncclMax  ? std::max(a, v)
                    : op == ncclMin  ? std::min(a, v)
                                     : a + v;
            }
        }
        for (size_t i = 0; i < m; i++) put((char*)to + (begin + i) * s, t, op == ncclAvg ? sum[i] / c->size : sum[i]);
    }
}

void flush() {
    if (depth) return;
    auto out = std::move(sends), in = std::move(receives);
    sends.clear(), receives.clear();
    for (auto& f : out) f();
    for (auto& f : in) f();
}

std::string message(ncclComm_t c, int from, int to, long k) {
    return c->of(std::to_string(from) + "-" + std::to_string(to) + "-" + std::to_string(k));
}

void send(const void* p, size_t n, int peer, ncclComm_t c) {
    sends.push_back([=] {
        std::string name = message(c, c->rank, peer, c->sent[peer]++), unfinished = name + "~";
        int f = open(unfinished.c_str(), O_RDWR | O_CREAT, 0600);
        ncclComm::transfer(f, 0, (void*)p, ncclComm::carried(n), pwrite);
        close(f);
        rename(unfinished.c_str(), name.c_str());
    });
    flush();
}

void receive(void* p, size_t n, int peer, ncclComm_t c) {
    receives.push_back([=] {
        std::string name = message(c, peer, c->rank, c->received[peer]++);
        int f;
        while ((f = open(name.c_str(), O_RDONLY)) < 0) usleep(20);
        ncclComm::transfer(f, 0, p, ncclComm::carried(n), pread);
        close(f);
        unlink(name.c_str());
    });
    flush();
}
}  // namespace

NCCL(ncclGetVersion, int* v) { return *v = NCCL_VERSION_CODE, ncclSuccess; }
extern "C" const char* ncclGetErrorString(ncclResult_t r) { return r ? "null NCCL has no such function" : "no error"; }
extern "C" const char* ncclGetLastError(ncclComm_t) { return ""; }
NCCL(ncclGetUniqueId, ncclUniqueId* id) {
    static std::atomic<int> next{0};
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "/dev/shm/null-nccl-%d-%d", getpid(), next++);
    return ncclSuccess;
}
NCCL(ncclCommInitRankConfig, ncclComm_t* c, int size, ncclUniqueId id, int rank, ncclConfig_t*) {
    return *c = new ncclComm(id.internal, size, rank), ncclSuccess;
}
NCCL(ncclCommInitRank, ncclComm_t* c, int size, ncclUniqueId id, int rank) {
    return ncclCommInitRankConfig(c, size, id, rank, nullptr);
}
NCCL(ncclCommDestroy, ncclComm_t c) { return delete c, ncclSuccess; }
NCCL(ncclCommAbort, ncclComm_t c) { return delete c, ncclSuccess; }
NCCL(ncclCommGetAsyncError, ncclComm_t, ncclResult_t* e) { return *e = ncclSuccess; }
NCCL(ncclCommCount, const ncclComm_t c, int* n) { return *n = c->size, ncclSuccess; }
NCCL(ncclCommUserRank, const ncclComm_t c, int* r) { return *r = c->rank, ncclSuccess; }
NOTHING(ncclCommFinalize) NOTHING(ncclCommRegister) NOTHING(ncclCommDeregister) NOTHING(ncclCommWindowRegister)
NOTHING(ncclCommWindowDeregister)
NOT_HERE(ncclCommInitAll) NOT_HERE(ncclCommInitRankScalable) NOT_HERE(ncclCommShrink) NOT_HERE(ncclCommSplit)
NOT_HERE(ncclDevCommCreate) NOT_HERE(ncclDevCommDestroy) NOT_HERE(ncclGroupSimulateEnd) NOT_HERE(ncclMemAlloc)
NOT_HERE(ncclMemFree)

NCCL(ncclGroupStart) { return depth++, ncclSuccess; }
NCCL(ncclGroupEnd) { return depth--, flush(), ncclSuccess; }

NCCL(ncclRedOpCreatePreMulSum, ncclRedOp_t* op, void* scalar, ncclDataType_t t, ncclScalarResidence_t, ncclComm_t) {
    *op = (ncclRedOp_t)(ncclNumOps + scales.size());
    return scales[*op] = number((char*)scalar, t), ncclSuccess;
}
NOTHING(ncclRedOpDestroy)

NCCL(ncclAllReduce, const void* from, void* to, size_t n, ncclDataType_t t, ncclRedOp_t op, ncclComm_t c,
     cudaStream_t) {
    c->exchange(from, n * size_of(t), [=](ncclComm::Read read) { reduce(c, read, 0, to, n, t, op); });
    return ncclSuccess;
}
NCCL(ncclReduce, const void* from, void* to, size_t n, ncclDataType_t t, ncclRedOp_t op, int root, ncclComm_t c,
     cudaStream_t) {
    c->exchange(from, n * size_of(t), [=](ncclComm::Read read) {
        if (c->rank == root) reduce(c, read, 0, to, n, t, op);
    });
    return ncclSuccess;
}
NCCL(ncclReduceScatter, const void* from, void* to, size_t n, ncclDataType_t t, ncclRedOp_t op, ncclComm_t c,
     cudaStream_t) {
    c->exchange(from, n * size_of(t) * c->size,
                [=](ncclComm::Read read) { reduce(c, read, n * c->rank, to, n, t, op); });
    return ncclSuccess;
}
NCCL(ncclAllGather, const void* from, void* to, size_t n, ncclDataType_t t, ncclComm_t c, cudaStream_t) {
    n *= size_of(t);
    c->exchange(from, n, [=](ncclComm::Read read) {
        for (int r = 0; r < c->size; r++) read(r, 0, (char*)to + r * n, n);
    });
    return ncclSuccess;
}
NCCL(ncclAlltoAll, const void* from, void* to, size_t n, ncclDataType_t t, ncclComm_t c, cudaStream_t) {
    n *= size_of(t);
    c->exchange(from, n * c->size, [=](ncclComm::Read read) {
        for (int r = 0; r < c->size; r++) read(r, c->rank * n, (char*)to + r * n, n);
    });
    return ncclSuccess;
}
NCCL(ncclBroadcast, const void* from, void* to, size_t n, ncclDataType_t t, int root, ncclComm_t c, cudaStream_t) {
    n *= size_of(t);
    c->exchange(from, c->rank == root ? n : 0, [=](ncclComm::Read read) {
        if (ncclComm::carried(n)) read(root, 0, to, n);
    });
    return ncclSuccess;
}
NCCL(ncclBcast, void* p, size_t n, ncclDataType_t t, int root, ncclComm_t c, cudaStream_t s) {
    return ncclBroadcast(p, p, n, t, root, c, s);
}
NCCL(ncclSend, const void* p, size_t n, ncclDataType_t t, int peer, ncclComm_t c, cudaStream_t) {
    return send(p, n * size_of(t), peer, c), ncclSuccess;
}
NCCL(ncclRecv, void* p, size_t n, ncclDataType_t t, int peer, ncclComm_t c, cudaStream_t) {
    return receive(p, n * size_of(t), peer, c), ncclSuccess;
}
