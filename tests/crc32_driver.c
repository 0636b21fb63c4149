/* Compares crc32_update and crc32_batch with the definition, a bit at a time: every length at every alignment, every
 * split, the lengths around the folding of long buffers. tests/test_crc32.py compiles it with each compiler, form of
 * the routine and sanitizer. */
#include "_crc32.c"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LONGEST 40000
#define SHORT 4096

static uint32_t expected[LONGEST + 1];

static void check(int good, const char *what, size_t length, size_t place)
{
    if (!good) {
        printf("wrong: %s, length %lu, at %lu\n", what, (unsigned long)length, (unsigned long)place);
        exit(1);
    }
}

/* The copy fills its allocation, so that AddressSanitizer sees a read past either end. */
static void check_copy(const unsigned char *data, size_t length, size_t alignment)
{
    const size_t size = alignment + length;
    unsigned char *copy = malloc(size > 0 ? size : 1);

    check(copy != NULL, "out of memory", length, alignment);
    memcpy(copy + alignment, data, length);
    check(crc32_update(0, copy + alignment, length) == expected[length], "update", length, alignment);
    free(copy);
}

int main(void)
{
    static unsigned char data[LONGEST];
    static const size_t long_splits[] = {1, 7, 6399, 6400, 6401, 10399, 10400, 20000};
    uint32_t crc = 0xFFFFFFFF, seed = 1;
    size_t length, at, i;
    int bit;

    for (length = 0; length < LONGEST; length++) {
        expected[length] = ~crc;
        seed = seed * 1664525 + 1013904223;
        data[length] = (unsigned char)(seed >> 24);
        crc ^= data[length];
        for (bit = 0; bit < 8; bit++)
            crc = crc & 1 ? crc >> 1 ^ 0xEDB88320 : crc >> 1;
    }
    expected[LONGEST] = ~crc;
    check(crc32_update(0, "123456789", 9) == 0xCBF43926, "check value", 9, 0);
    check(crc32_update(0, NULL, 0) == 0, "empty", 0, 0);
    check(crc32_update(0x12345678, NULL, 0) == 0x12345678, "nothing more", 0, 0);
    for (length = 0; length <= SHORT; length++)
        for (at = 0; at < 16; at++)
            check_copy(data, length, at);
    /* Folding begins at 6400 bytes and goes on by 4000. */
    for (length = 6380; length <= LONGEST; length += length % 4000 >= 2380 && length % 4000 <= 2420 ? 1 : 61)
        check_copy(data, length, length % 16);
    for (at = 0; at <= SHORT; at++)
        check(crc32_update(expected[at], data + at, SHORT - at) == expected[SHORT], "split", SHORT, at);
    for (i = 0; i < sizeof long_splits / sizeof *long_splits; i++) {
        at = long_splits[i];
        check(crc32_update(expected[at], data + at, LONGEST - at) == expected[LONGEST], "split", LONGEST, at);
    }
#if !defined(CRC32_SMALL) && !defined(CRC32_BITWISE)
    {
        static uint64_t offsets[202];
        static uint32_t out[201];

        for (i = 0; i < 201; i++)
            offsets[i + 1] = offsets[i] + (i == 100 ? 9000 : i % 101);
        crc32_batch(data, offsets, 201, out);
        for (i = 0; i < 201; i++)
            check(out[i] == crc32_update(0, data + offsets[i], (size_t)(offsets[i + 1] - offsets[i])), "batch", i, 0);
        check(out[0] == 0 && out[1] == crc32_update(0, data, 1), "batch", 0, 0);
        crc32_batch(data, offsets, 0, out);
    }
#endif
    puts("ok");
    return 0;
}
