/* CRC32, the IEEE checksum: polynomial 04C11DB7, reflected (EDB88320), init and xor-out FFFFFFFF.
 * Check value: "123456789" gives CBF43926.
 *
 * uint32_t crc32_update(uint32_t crc, const void *data, size_t length)
 *     The checksum of what gave `crc` followed by the `length` bytes at `data`; 0 for `crc` begins. It cannot fail.
 *     `data` may lie at any alignment, and may be NULL where `length` is 0.
 *
 * void crc32_batch(const unsigned char *buffer, const uint64_t *offsets, size_t count, uint32_t *out)
 *     The checksums of `count` payloads that lie in one buffer: payload i is from buffer[offsets[i]] up to
 *     buffer[offsets[i + 1]]. So `offsets` holds count + 1 numbers, none smaller than the one before, and `out`
 *     takes `count`.
 *
 * C99, little or big endian. Nothing is allocated and nothing changes after load, so any number of threads may call.
 * As it is, the file needs 16 KiB of constant tables, and 6.4 KiB of stack for a buffer of that size or longer. For
 * devices with little flash compile it with -DCRC32_SMALL (64 bytes of table) or -DCRC32_BITWISE (none): the same
 * crc32_update, no crc32_batch, and no call of any library.
 */
#include <stddef.h>
#include <stdint.h>
#if !defined(CRC32_SMALL) && !defined(CRC32_BITWISE)
#include <string.h>
#endif

uint32_t crc32_update(uint32_t crc, const void *data, size_t length);

#if defined(CRC32_BITWISE)

static uint32_t run(uint32_t crc, const unsigned char *p, size_t length)
{
    int bit;

    for (; length > 0; length--) {
        crc ^= *p++;
        for (bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320 : 0);
    }
    return crc;
}

#else

/* The compiler generates the tables. An entry is the XOR of what the bits of its index stand for, so a table follows
 * from its entries at 80, 40, 20, 10, 8, 4, 2, 1 (hex), which are consecutive powers of x modulo the polynomial, each
 * the one before times x: v >> 1 ^ (v & 1 ? 0xEDB88320 : 0). They are the arguments, in that order. */
#define BIT(v, x1) v, v ^ x1
#define BITS2(v, x2, x1) BIT(v, x1), BIT(v ^ x2, x1)
#define BITS3(v, x4, x2, x1) BITS2(v, x2, x1), BITS2(v ^ x4, x2, x1)
#define NIBBLE(v, x8, x4, x2, x1) BITS3(v, x4, x2, x1), BITS3(v ^ x8, x4, x2, x1)
#define BITS5(v, x10, x8, x4, x2, x1) NIBBLE(v, x8, x4, x2, x1), NIBBLE(v ^ x10, x8, x4, x2, x1)
#define BITS6(v, x20, x10, x8, x4, x2, x1) BITS5(v, x10, x8, x4, x2, x1), BITS5(v ^ x20, x10, x8, x4, x2, x1)
#define BITS7(v, x40, x20, x10, x8, x4, x2, x1) \
    BITS6(v, x20, x10, x8, x4, x2, x1), BITS6(v ^ x40, x20, x10, x8, x4, x2, x1)
#define BYTE(x80, x40, x20, x10, x8, x4, x2, x1) \
    {BITS7(0u, x40, x20, x10, x8, x4, x2, x1), BITS7(0u ^ x80, x40, x20, x10, x8, x4, x2, x1)}

#if defined(CRC32_SMALL)

static const uint32_t table[16] = {NIBBLE(0u, 0xEDB88320, 0x76DC4190, 0x3B6E20C8, 0x1DB71064)};

static uint32_t run(uint32_t crc, const unsigned char *p, size_t length)
{
    for (; length > 0; length--) {
        crc ^= *p++;
        crc = crc >> 4 ^ table[crc & 15];
        crc = crc >> 4 ^ table[crc & 15];
    }
    return crc;
}

#else

/* table[d][b] is the register after the byte b and d zero bytes: slicing by 16. */
static const uint32_t table[16][256] = {
    BYTE(0xEDB88320, 0x76DC4190, 0x3B6E20C8, 0x1DB71064, 0x0EDB8832, 0x076DC419, 0xEE0E612C, 0x77073096),
    BYTE(0x3B83984B, 0xF0794F05, 0x958424A2, 0x4AC21251, 0xC8D98A08, 0x646CC504, 0x32366282, 0x191B3141),
    BYTE(0xE1351B80, 0x709A8DC0, 0x384D46E0, 0x1C26A370, 0x0E1351B8, 0x0709A8DC, 0x0384D46E, 0x01C26A37),
    BYTE(0xED59B63B, 0x9B14583D, 0xA032AF3E, 0x5019579F, 0xC5B428EF, 0x8F629757, 0xAA09C88B, 0xB8BC6765),
    BYTE(0xB1E6B092, 0x58F35849, 0xC1C12F04, 0x60E09782, 0x30704BC1, 0xF580A6C0, 0x7AC05360, 0x3D6029B0),
    BYTE(0x1EB014D8, 0x0F580A6C, 0x07AC0536, 0x03D6029B, 0xEC53826D, 0x9B914216, 0x4DC8A10B, 0xCB5CD3A5),
    BYTE(0x8816EAF2, 0x440B7579, 0xCFBD399C, 0x67DE9CCE, 0x33EF4E67, 0xF44F2413, 0x979F1129, 0xA6770BB4),
    BYTE(0x533B85DA, 0x299DC2ED, 0xF9766256, 0x7CBB312B, 0xD3E51BB5, 0x844A0EFA, 0x4225077D, 0xCCAA009E),
    BYTE(0x6655004F, 0xDE920307, 0x82F182A3, 0xACC04271, 0xBBD8A218, 0x5DEC510C, 0x2EF62886, 0x177B1443),
    BYTE(0xE6050901, 0x9EBA07A0, 0x4F5D03D0, 0x27AE81E8, 0x13D740F4, 0x09EBA07A, 0x04F5D03D, 0xEFC26B3E),
    BYTE(0x77E1359F, 0xD64819EF, 0x869C8FD7, 0xAEF6C4CB, 0xBAC3E145, 0xB0D97382, 0x586CB9C1, 0xC18EDFC0),
    BYTE(0x60C76FE0, 0x3063B7F0, 0x1831DBF8, 0x0C18EDFC, 0x060C76FE, 0x03063B7F, 0xEC3B9E9F, 0x9BA54C6F),
    BYTE(0xA06A2517, 0xBD8D91AB, 0xB37E4BF5, 0xB407A6DA, 0x5A03D36D, 0xC0B96A96, 0x605CB54B, 0xDD96D985),
    BYTE(0x8373EFE2, 0x41B9F7F1, 0xCD6478D8, 0x66B23C6C, 0x33591E36, 0x19AC8F1B, 0xE16EC4AD, 0x9D0FE176),
    BYTE(0x4E87F0BB, 0xCAFB7B7D, 0x88C53E9E, 0x44629F4F, 0xCF89CC87, 0x8A7C6563, 0xA886B191, 0xB9FBDBE8),
    BYTE(0x5CFDEDF4, 0x2E7EF6FA, 0x173F7B7D, 0xE6273E9E, 0x73139F4F, 0xD4314C87, 0x87A02563, 0xAE689191),
};

/* Compilers make one load of it, with a swap where the machine is big endian. */
static uint32_t word(const unsigned char *p)
{
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

/* The register after the four bytes of `w` and `zeros` zero bytes. */
static uint32_t advance(uint32_t w, int zeros)
{
    return table[zeros + 3][w & 255] ^ table[zeros + 2][w >> 8 & 255] ^ table[zeros + 1][w >> 16 & 255] ^
           table[zeros][w >> 24];
}

/* The words that do not wait for the register come first: their lookups run while the previous step ends. */
static uint32_t slice(uint32_t crc, const unsigned char *p, size_t length)
{
    for (; length >= 16; length -= 16, p += 16)
        crc = advance(word(p + 4), 8) ^ advance(word(p + 8), 4) ^ advance(word(p + 12), 0) ^
              advance(crc ^ word(p), 12);
    if (length & 8) {
        crc = advance(word(p + 4), 0) ^ advance(crc ^ word(p), 4);
        p += 8;
    }
    if (length & 4) {
        crc = advance(crc ^ word(p), 0);
        p += 4;
    }
    for (length &= 3; length > 0; length--)
        crc = crc >> 8 ^ table[0][(crc ^ *p++) & 255];
    return crc;
}

/* A long buffer is folded before it is sliced. With y = x^64, one 8-byte word, the polynomial divides
 *     y^300 + y^155 + y^117 + y^89 + 1,
 * so a word may be taken out and added (XOR) to the words 145, 183, 211 and 300 places further on, and the remainder
 * stays. Whole words are added in place, whichever their byte order. Only the last 300 words need the tables. */
enum { FOLD1 = 145, FOLD2 = 183, FOLD3 = 211, SPAN = 300, STEP = 500 };

static uint32_t fold(uint32_t crc, const unsigned char **data, size_t *length)
{
    uint64_t kept[SPAN + STEP]; /* SPAN words taken out before, then those of this step */
    uint64_t *const now = kept + SPAN;
    const unsigned char first[4] = {(unsigned char)crc, (unsigned char)(crc >> 8), (unsigned char)(crc >> 16),
                                    (unsigned char)(crc >> 24)};
    int i;

    /* The register is added to the first bytes: as a word taken out SPAN places before them it arrives just there. */
    memset(kept, 0, SPAN * 8);
    memcpy(kept, first, 4);
    while (*length >= (SPAN + STEP) * 8) {
        memcpy(now, *data, STEP * 8);
        for (i = 0; i < STEP; i++)
            now[i] ^= now[i - FOLD1] ^ now[i - FOLD2] ^ now[i - FOLD3] ^ now[i - SPAN];
        memmove(kept, kept + STEP, SPAN * 8);
        *data += STEP * 8;
        *length -= STEP * 8;
    }
    /* These words stay: they take what was taken out before them, not from one another. */
    memcpy(now, *data, SPAN * 8);
    for (i = 0; i < SPAN; i++)
        now[i] ^= now[i - SPAN] ^ (i < FOLD1 ? now[i - FOLD1] : 0) ^ (i < FOLD2 ? now[i - FOLD2] : 0) ^
                  (i < FOLD3 ? now[i - FOLD3] : 0);
    *data += SPAN * 8;
    *length -= SPAN * 8;
    return slice(0, (const unsigned char *)now, SPAN * 8);
}

static uint32_t run(uint32_t crc, const unsigned char *p, size_t length)
{
    if (length >= (SPAN + STEP) * 8)
        crc = fold(crc, &p, &length);
    return slice(crc, p, length);
}

void crc32_batch(const unsigned char *buffer, const uint64_t *offsets, size_t count, uint32_t *out);

void crc32_batch(const unsigned char *buffer, const uint64_t *offsets, size_t count, uint32_t *out)
{
    size_t i;

    for (i = 0; i < count; i++)
        out[i] = crc32_update(0, buffer + offsets[i], (size_t)(offsets[i + 1] - offsets[i]));
}

#endif
#endif

uint32_t crc32_update(uint32_t crc, const void *data, size_t length)
{
    return ~run(~crc, data, length);
}
